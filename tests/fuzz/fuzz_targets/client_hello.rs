//! The first bytes of a client on a TLS port: detection does not depend on how they are split.
#![no_main]

use libfuzzer_sys::fuzz_target;
use raven_agent::proxy::client_hello;

fuzz_target!(|bytes: &[u8]| {
    let whole = client_hello::is_client_hello(&[bytes]);
    let (a, b) = bytes.split_at(bytes.len() / 2);
    assert_eq!(whole, client_hello::is_client_hello(&[a, b]));
});
