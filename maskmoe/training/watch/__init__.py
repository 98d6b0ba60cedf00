"""What accompanies a running training: its console, its logs, and watches over loss, routing and hangs."""
