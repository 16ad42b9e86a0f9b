//! Requests to the conversion webhook: the result is an answer or an error, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = raven_controller::webhook::convert::answer(bytes);
    // The conversion of a Gateway to the other version and back is lossless.
    if let Ok(gateway) = serde_json::from_slice::<raven_api::Gateway>(bytes) {
        let there = raven_api::conversion::to_v1alpha1(gateway.clone());
        let back = raven_api::conversion::to_v1beta1(there);
        assert_eq!(back.spec, gateway.spec);
    }
});
