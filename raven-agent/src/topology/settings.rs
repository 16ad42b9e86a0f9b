//! Cluster-wide settings, from the ConfigMaps `raven-cfg` and `raven-agent-config`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// ConfigMap with the switches of the two halves.
pub const SWITCHES: &str = "raven-cfg";
/// ConfigMap with settings of all agents.
pub const AGENT_CONFIG: &str = "raven-agent-config";

/// What all agents must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// `raven-cfg`, `enable-l3-tunnel`: off takes the dataplane down everywhere.
    pub l3: bool,
    /// `raven-cfg`, `enable-l7-proxy`: off closes the proxy everywhere.
    pub l7: bool,
    /// `raven-agent-config`, `forward-node-ip`: node addresses of other pools are reached, too.
    pub forward_node_ip: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { l3: true, l7: true, forward_node_ip: false }
    }
}

impl Settings {
    /// From the data of the two ConfigMaps; absent is empty. Only the word `false` switches a half off, as in the controller: a
    /// typing error must not cut a cluster's network.
    pub fn parse(switches: &BTreeMap<String, String>, agent: &BTreeMap<String, String>) -> Self {
        let is =
            |data: &BTreeMap<String, String>, key: &str, word: &str| data.get(key).is_some_and(|v| v.trim().eq_ignore_ascii_case(word));
        Self {
            l3: !is(switches, "enable-l3-tunnel", "false"),
            l7: !is(switches, "enable-l7-proxy", "false"),
            forward_node_ip: is(agent, "forward-node-ip", "true"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn absent_means_on_and_a_typing_error_switches_nothing_off() {
        let none = BTreeMap::new();
        assert_eq!(Settings::parse(&none, &none), Settings::default());
        assert!(Settings::parse(&data("enable-l3-tunnel", "flase"), &none).l3);
        assert!(!Settings::parse(&data("enable-l3-tunnel", " False"), &none).l3);
        let l7_off = Settings::parse(&data("enable-l7-proxy", "false"), &none);
        assert!(l7_off.l3 && !l7_off.l7, "either half by itself");
        assert!(Settings::parse(&none, &data("forward-node-ip", "true")).forward_node_ip);
    }
}
