//! Names of kernel releases, and values of ConfigMaps.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use raven_agent::{
    bpf::probe::Release,
    topology::{ClusterSettings, PublicKey},
};

fuzz_target!(|text: &str| {
    let _ = text.parse::<Release>();
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string().parse(), Ok(key));
    }
    let data = BTreeMap::from([
        ("enable-l3-tunnel".to_owned(), text.to_owned()),
        ("forward-node-ip".to_owned(), text.to_owned()),
    ]);
    let _ = ClusterSettings::parse(&data, &data);
});
