"Two tests run at once on two cores: one thread each, for them and for the kernels and processes that they start."
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which comes after
