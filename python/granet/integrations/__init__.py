"""Callbacks for other libraries' training loops, a module each; none is imported unless you do."""
