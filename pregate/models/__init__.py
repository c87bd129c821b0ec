"""What a Mixture-of-Experts model is: routing maths, expert computation and the supported families."""
