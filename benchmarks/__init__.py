"""Side-by-side measurements; results/ keeps them with device, versions and date."""
