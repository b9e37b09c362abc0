"""Generation: the target answers seed instructions."""

from dist_train.runtime.callable_package import make_callable

make_callable(__name__)
