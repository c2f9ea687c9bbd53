"""Files written whole and the machine a command runs on; knows no model, no data and no run."""
