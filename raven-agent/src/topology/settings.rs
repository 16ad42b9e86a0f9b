//! Cluster-wide settings, from the ConfigMaps `raven-cfg` and `raven-agent-config`.

use std::collections::BTreeMap;

use raven_api::names::{AGENT_CONFIG_FORWARD_NODE_IP, SWITCH_L3, SWITCH_L7};
use serde::{Deserialize, Serialize};

/// Settings that all agents must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterSettings {
    /// Key `enable-l3-tunnel` of `raven-cfg`. Off removes the L3 dataplane from all nodes.
    pub l3: bool,
    /// Key `enable-l7-proxy` of `raven-cfg`. Off stops the proxy on all nodes.
    pub l7: bool,
    /// Key `forward-node-ip` of `raven-agent-config`. On makes node addresses of other pools reachable.
    pub forward_node_ip: bool,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self { l3: true, l7: true, forward_node_ip: false }
    }
}

impl ClusterSettings {
    /// The settings from the data of the two ConfigMaps; pass an empty map for an absent one. Only the word `false`
    /// switches a half off, as in the controller: a typing error must not disconnect a cluster.
    pub fn parse(switches: &BTreeMap<String, String>, agent: &BTreeMap<String, String>) -> Self {
        let is = |data: &BTreeMap<String, String>, key: &str, word: &str| {
            data.get(key).is_some_and(|v| v.trim().eq_ignore_ascii_case(word))
        };
        Self {
            l3: !is(switches, SWITCH_L3, "false"),
            l7: !is(switches, SWITCH_L7, "false"),
            forward_node_ip: is(agent, AGENT_CONFIG_FORWARD_NODE_IP, "true"),
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
    fn absent_keys_and_typing_errors_leave_both_halves_on() {
        let none = BTreeMap::new();
        assert_eq!(ClusterSettings::parse(&none, &none), ClusterSettings::default());
        assert!(ClusterSettings::parse(&data("enable-l3-tunnel", "flase"), &none).l3);
        assert!(!ClusterSettings::parse(&data("enable-l3-tunnel", " False"), &none).l3);
        let l7_off = ClusterSettings::parse(&data("enable-l7-proxy", "false"), &none);
        assert!(l7_off.l3 && !l7_off.l7, "each half has its own switch");
        assert!(ClusterSettings::parse(&none, &data("forward-node-ip", "true")).forward_node_ip);
    }
}
