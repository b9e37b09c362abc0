"""`dist-train prepare`: the tokenizer meets `data_shards`."""
