//! Tests of the CRD schema, which works without webhook and controller: validation with Raven's
//! messages, and default values.

use anyhow::{Context, Result};
use raven_tests::test_name;
use serde_json::{Value, json};

use crate::fixture::{Fixture, run};

#[tokio::test(flavor = "multi_thread")]
async fn schema_rejects_invalid_gateways() {
    run(test_name!(), async |fixture| {
        let endpoints = |list: Value| json!({ "endpoints": list });
        let tunnels = |count: usize| (0..count).map(|i| json!({"nodeName": format!("n{i}")})).collect::<Vec<_>>();
        let proxies = |replicas: i32, count: usize| {
            let listed: Vec<_> = (0..count).map(|i| json!({"nodeName": format!("n{i}"), "type": "proxy"})).collect();
            json!({"proxyConfig": {"Replicas": replicas}, "endpoints": listed})
        };
        let refused = [
            (json!({"exposeType": "Public"}), &["spec.exposeType", "supported values", "PublicIP", "LoadBalancer"][..]),
            (
                json!({"exposeType": "PublicIP", "endpoints": [{"nodeName": "a", "underNAT": true}]}),
                &["gateway nodes of other pools dial an exposed gateway (exposeType is set): no endpoint of it may be underNAT"],
            ),
            (
                endpoints(json!([{"nodeName": "a", "underNAT": true}, {"nodeName": "b"}])),
                &["underNAT must be the same for all endpoints of a gateway: they are behind the same site"],
            ),
            (
                endpoints(json!([{"nodeName": "a", "publicIP": "example.com"}])),
                &["publicIP must be an IPv4 or IPv6 address that other pools can dial, not a name or a prefix"],
            ),
            (endpoints(json!([{"nodeName": "a", "publicIP": "192.0.2.0/24"}])), &["publicIP must be an IPv4 or IPv6 address"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "127.0.0.1"}])), &["not a loopback, link-local or multicast address"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "ff02::1"}])), &["not a loopback, link-local or multicast address"]),
            (
                endpoints(json!([{"nodeName": "a", "publicIP": "0.0.0.0"}])),
                &["publicIP must be an IPv4 or IPv6 address that other pools can dial"],
            ),
            (endpoints(json!([{"nodeName": "a", "publicIP": "47.xxx.xxx.xxx"}])), &["publicIP must be"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "256.1.1.1"}])), &["publicIP must be"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "239.1.2.3"}])), &["publicIP must be"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "::1"}])), &["publicIP must be"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "FE80::1"}])), &["publicIP must be"]),
            (endpoints(json!([{"nodeName": "a", "publicIP": "::ffff:198.51.100.1"}])), &["publicIP must be"]),
            (endpoints(json!([{"nodeName": "a", "publicPort": 0}])), &["spec.endpoints[0].publicPort", "greater than or equal to 1"]),
            (proxies(3, 2), &["proxyConfig.Replicas is larger than the number of endpoints of type proxy"]),
            (json!({"tunnelConfig": {"Replicas": 17}}), &["spec.tunnelConfig.Replicas", "less than or equal to 16"]),
            (json!({"tunnelConfig": {"Replicas": -1}}), &["spec.tunnelConfig.Replicas", "greater than or equal to 0"]),
            (json!({"proxyConfig": {"Replicas": 65}}), &["spec.proxyConfig.Replicas", "less than or equal to 64"]),
            (json!({"proxyConfig": {"proxyHTTPPort": "10255;9445"}}), &["spec.proxyConfig.proxyHTTPPort", "should match"]),
            (endpoints(json!([{"nodeName": ""}])), &["spec.endpoints[0].nodeName", "at least 1 char"]),
            (endpoints(json!([{"type": "tunnel"}])), &["spec.endpoints[0].nodeName", "Required value"]),
            (endpoints(json!([{"nodeName": "a", "type": "vpn"}])), &["spec.endpoints[0].type", "supported values", "proxy", "tunnel"]),
            (endpoints(json!([{"nodeName": "a", "port": 0}])), &["spec.endpoints[0].port", "greater than or equal to 1"]),
            (endpoints(json!(tunnels(257))), &["spec.endpoints", "must have at most 256 items"]),
        ];
        for (spec, words) in refused {
            let error = match fixture.put_gateway("g", spec.clone()).await {
                Ok(_) => panic!("the API server accepted {spec}"),
                Err(error) => format!("{error:?}"),
            };
            for word in words {
                assert!(error.contains(word), "the error for {spec} should contain {word:?}: {error}");
            }
        }
        assert!(fixture.gateways.get_opt("g").await?.is_none());

        let taken = [
            json!({}),
            endpoints(json!([{"nodeName": "a", "publicIP": ""}, {"nodeName": "b", "publicIP": "2001:db8::1"}])),
            endpoints(json!([{"nodeName": "a", "publicIP": "10.0.0.1"}, {"nodeName": "b", "publicIP": "fd00:1:2:3:4:5:6:7"}])),
            endpoints(json!(tunnels(256))),
            proxies(2, 2),
            proxies(0, 2),
            proxies(2, 0),
            // Only tunnel endpoints are listed: every node of the pool is a candidate for the proxy.
            json!({"proxyConfig": {"Replicas": 2}, "endpoints": tunnels(1)}),
        ];
        for spec in taken {
            fixture.put_gateway("g", spec.clone()).await.with_context(|| spec.to_string())?;
        }
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_sets_defaults() {
    run(test_name!(), async |fixture| {
        let given =
            json!({"proxyConfig": {"proxyHTTPPort": "10255, 9445"}, "tunnelConfig": {}, "endpoints": [{"nodeName": "a"}]});
        fixture.put_gateway("g", given).await?;
        let stored = spec(fixture, "g").await?;
        assert_eq!((&stored["proxyConfig"]["Replicas"], &stored["tunnelConfig"]["Replicas"]), (&json!(1), &json!(1)));
        assert_eq!(stored["endpoints"], json!([{"nodeName": "a", "type": "tunnel", "underNAT": false}]));

        fixture.put_gateway("g", json!({"proxyConfig": {"Replicas": 0}, "tunnelConfig": {"Replicas": 0}})).await?;
        let stored = spec(fixture, "g").await?;
        assert_eq!((&stored["proxyConfig"]["Replicas"], &stored["tunnelConfig"]["Replicas"]), (&json!(0), &json!(0)));
        Ok(())
    })
    .await;
}

async fn spec(fixture: &Fixture, gateway: &str) -> Result<Value> {
    let object: Value = serde_json::from_str(&fixture.raw(gateway).await?)?;
    Ok(object["spec"].clone())
}
