"""The scheduler and the cost model against simulated instances, in virtual time."""
