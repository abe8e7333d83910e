"""What `granet bench` measures: steps of a network, timed in turn, beside the roofline of the machine."""
