"""`dist-train prepare`: the tokenizer meets `data_shards`."""

from dist_train.runtime.callable_package import make_callable

make_callable(__name__)
