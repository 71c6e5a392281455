"""From the abstract operations of the rewrites to those of a device."""
