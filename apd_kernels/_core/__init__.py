"""What every operation shares: backend choice, argument checks, precision policy, operator registration."""
