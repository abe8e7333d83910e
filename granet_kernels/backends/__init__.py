"""One package a backend, each a namespace of functions named after the operators; none imports another."""
