//! Everything that can be wrong with a request to this crate.

/// What was wrong: the argument, what was given and what was wanted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A name that is none of the known ones.
    #[error("{argument}: got '{given}', wanted one of {wanted}")]
    Name {
        /// The argument.
        argument: &'static str,
        /// The name given.
        given: String,
        /// The known names.
        wanted: String,
    },
    /// K is zero, or larger than E where the experts of a token are distinct.
    #[error("top_k: got {given}, wanted 1 to {experts}, the number of experts")]
    TopK {
        /// K.
        given: usize,
        /// E.
        experts: usize,
    },
    /// The experts cannot be divided, or chosen from, in groups like that.
    #[error("{argument}: got {given}, wanted {wanted}")]
    Groups {
        /// The argument.
        argument: &'static str,
        /// The number given.
        given: usize,
        /// The numbers that would be right.
        wanted: String,
    },
    /// A number of the router is out of its range.
    #[error("{argument}: got {given}, wanted {wanted}")]
    Number {
        /// The argument.
        argument: &'static str,
        /// The number given.
        given: f64,
        /// The numbers that would be right.
        wanted: &'static str,
    },
    /// An array has the wrong number of elements.
    #[error("{argument}: got {given} elements, wanted {wanted}")]
    Length {
        /// The array.
        argument: &'static str,
        /// Its number of elements.
        given: usize,
        /// The number that the other arguments ask for.
        wanted: usize,
    },
    /// Rows are numbered with 32 bits.
    #[error("{argument}: got {given} rows, wanted less than 2^31")]
    TooManyRows {
        /// What the rows are counted in.
        argument: &'static str,
        /// The number of rows (saturated).
        given: usize,
    },
    /// Routing weights are needed and were not given.
    #[error("weights: got none, wanted one per routed row, because {needed_by} needs them")]
    MissingWeights {
        /// What needs the weights.
        needed_by: &'static str,
    },
    /// An expert id outside `0..E`.
    #[error("ids[{token}, {slot}]: got {given}, wanted an expert id from 0 to {last}", last = experts.saturating_sub(1))]
    ExpertId {
        /// Token t of the first bad id.
        token: usize,
        /// Slot k of the first bad id.
        slot: usize,
        /// The id.
        given: i64,
        /// E.
        experts: usize,
    },
    /// The offsets of a plan do not start at 0, go down, or end past the last row.
    #[error("offsets[{index}]: got {given}, wanted {wanted}")]
    Offset {
        /// Position of the first bad offset.
        index: usize,
        /// The offset.
        given: i32,
        /// The values that would be right.
        wanted: String,
    },
    /// A sorted row of a plan is fed by a token that does not exist.
    #[error("gather[{row}]: got {given}, wanted a token below {tokens}, or -1")]
    Gather {
        /// First bad row.
        row: usize,
        /// The token.
        given: i32,
        /// T.
        tokens: usize,
    },
    /// A token of a plan points at a sorted row that does not exist.
    #[error("inverse[{token}, {slot}]: got {given}, wanted a sorted row below {rows}, or -1")]
    Inverse {
        /// Token t of the first bad entry.
        token: usize,
        /// Slot k of the first bad entry.
        slot: usize,
        /// The row.
        given: i32,
        /// Number of sorted rows.
        rows: usize,
    },
    /// A token of a plan points at a sorted row that another token feeds.
    #[error(
        "inverse[{token}, {slot}]: got row {given}, wanted a row that token {token} feeds (gather[{given}] is {fed_by})"
    )]
    Mismatch {
        /// Token t of the first bad entry.
        token: usize,
        /// Slot k of the first bad entry.
        slot: usize,
        /// The row.
        given: i32,
        /// The token that feeds that row.
        fed_by: i32,
    },
}

/// What a name stands for, out of all names that there are.
pub(crate) fn named<T: Copy>(argument: &'static str, given: &str, known: &[(&str, T)]) -> Result<T, Error> {
    match known.iter().find(|(name, _)| *name == given) {
        Some(&(_, value)) => Ok(value),
        None => {
            let names: Vec<_> = known.iter().map(|(name, _)| format!("'{name}'")).collect();
            Err(Error::Name { argument, given: given.into(), wanted: names.join(", ") })
        }
    }
}
