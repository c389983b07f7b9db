//! What becomes of the gradients of weights.

/// How a gradient meets the memory that it is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Update {
    /// Written, in the type of the weight; zeros for an expert without rows.
    #[default]
    Write,
    /// Added, in the type of the weight; an expert without rows leaves everything as it is.
    Add,
    /// The same in the type of sums, which loses nothing of them.
    AddWide,
}
