"""Published quantizers beside nuLSQ, one a file with its equations, on the same bench."""
