"""What `granet train` is made of: settings, the parts they amount to, the loop, and what a run leaves."""
