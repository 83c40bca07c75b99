"""What is written: the guarded folder, its time stamp, its signature, its bill of materials."""
