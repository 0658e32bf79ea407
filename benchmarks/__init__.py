"""Any `Vlm` to numbers, and numbers to a report; the reference pair and its benchmark."""
