//! What a routing plan is.
