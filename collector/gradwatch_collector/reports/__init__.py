"""What people read and pass on: words, pages and pictures of what is stored."""
