"""Fine-tuning: what the five scripts share. The lesson, prior preservation, new words, previews, and what it costs."""
