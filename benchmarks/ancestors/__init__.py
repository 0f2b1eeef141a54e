"""What runs inside a checkout of an ancestor: drivers of its code, and stand-ins for packages it imports."""
