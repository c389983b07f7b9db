//! Builds that are shipped carry no emulator.

use crate::driver::Driver;
use crate::{Error, Result};

/// Says why there is none.
pub fn open() -> Result<Box<dyn Driver>> {
    Err(Error::NoEmulator { reason: "this build has no emulator".to_owned() })
}
