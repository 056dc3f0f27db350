"""What a person sees: progress while it runs, a summary when it is done, single items on demand."""
