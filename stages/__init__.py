"""One job a file. Only these set up processes, devices and folders."""
