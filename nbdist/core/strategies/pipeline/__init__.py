"""Pipeline parallelism: schedules, and the executor that runs one on a rank."""
