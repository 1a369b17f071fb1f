"""A comparison of Voxelscale with nnU-Net and MONAI's DynUNet: see benchmarks/accuracy.py."""
