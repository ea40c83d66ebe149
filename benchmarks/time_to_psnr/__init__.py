"""Time to a PSNR: which recipe gets there first, on images nobody tuned on."""
