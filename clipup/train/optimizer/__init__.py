"""What is trained and how: locked parameters, parameter groups, optimizers and schedules."""
