"""What a store did and saved, as a page that a browser shows without a network, and as HTML in a notebook."""
