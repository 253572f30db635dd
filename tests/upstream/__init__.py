"""What users of upstream's checkpoint-engine 0.4.2 call, held against what is here."""
