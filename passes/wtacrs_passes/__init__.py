"""The compiler of wtacrs_fx: analysis, plan and rewrite of AOTAutograd's joint graph."""
