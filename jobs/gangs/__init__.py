"""A batch on gangs of Ray actors. The only room that imports ray; knows no command line."""
