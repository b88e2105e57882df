"""Small trained models, faults that are planted in them, and the cases that verdicts are held against."""
