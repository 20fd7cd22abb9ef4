"""Which sizes engines are built for."""
