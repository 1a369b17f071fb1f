"""What is done to a trained model: false-positive reduction, calibration, ensembles."""
