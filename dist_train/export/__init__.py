"""`dist-train export`: a drafter as a Hugging Face folder, refused where a server would refuse it."""

from dist_train.runtime.callable_package import make_callable

make_callable(__name__)
