"""What the verbs of the command line do, one file each, imported when the verb is called."""
