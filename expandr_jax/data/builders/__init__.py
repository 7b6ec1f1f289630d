"""Text data sets as TensorFlow Datasets builders, without TensorFlow: array_record files alone."""
