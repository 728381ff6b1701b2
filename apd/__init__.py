"""APD: models, training, evaluation and the command line for person re-identification, built on `apd_kernels`."""
