//! Random cases against the definition; the fuzz targets run the same bodies.

mod oracle;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn plan_agrees(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        oracle::plan_agrees(&bytes);
    }

    #[test]
    fn validation_agrees(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        oracle::validation_agrees(&bytes);
    }

    #[test]
    fn route_agrees(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        oracle::route_agrees(&bytes);
    }
}
