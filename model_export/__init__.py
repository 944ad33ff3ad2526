"""From a checkpoint to a verified bundle of ONNX graphs: the ``siamtrack-export`` command."""
