//! Tests of claims that a Gateway cannot have: its own status reports them, and no other Gateway is affected.

use raven_api::LABEL_GATEWAY;
use raven_tests::test_name;
use serde_json::json;

use crate::fixture::{elects, has_condition, nodes, run, site, status};

#[tokio::test(flavor = "multi_thread")]
async fn unknown_endpoint_node_is_rejected_without_side_effects() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let _controller = fixture.controller("one", &[]).await?;
        fixture.two_pools_are_ready().await?;
        let (cloud, before) = (fixture.raw("cloud").await?, status(&fixture.gateways.get("site").await?));

        fixture.put_gateway("site", site(&["nowhere", "x-b", "x-a"])).await?;
        let refused = fixture
            .until("site", "refuses the unknown node", |g| {
                has_condition(g, "Accepted", "False", "EndpointNodeUnknown", "node nowhere, which does not exist")
            })
            .await?;
        let after = status(&refused);
        assert_eq!(
            (after.nodes, after.node_count, after.active_endpoints),
            (before.nodes, before.node_count, before.active_endpoints)
        );
        has_condition(&refused, "Elected", "True", "Elected", "tunnel: x-b")?;
        has_condition(&refused, "Ready", "True", "Degraded", "node nowhere, which does not exist")?;
        assert_eq!(
            fixture.event("site", "EndpointNodeUnknown", "node nowhere, which does not exist").await?,
            "Warning"
        );

        // A node of another pool is rejected too.
        fixture.put_gateway("site", site(&["c-a", "x-b"])).await?;
        let foreign = fixture
            .until("site", "refuses the foreign node", |g| {
                has_condition(
                    g,
                    "Accepted",
                    "False",
                    "EndpointNodeUnknown",
                    "node c-a, which is not a node of this pool",
                )
            })
            .await?;
        elects(&foreign, &["x-b"])?;
        assert_eq!(nodes(&foreign), ["x-a", "x-b"]);

        fixture.put_gateway("site", site(&["x-b", "x-a"])).await?;
        fixture.until("site", "is accepted", |g| has_condition(g, "Accepted", "True", "Accepted", "")).await?;
        assert_eq!(fixture.event("site", "Accepted", "in force").await?, "Normal");
        assert_eq!(fixture.raw("cloud").await?, cloud, "the other Gateway must not change");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicting_claims_affect_only_the_second_gateway() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let _controller = fixture.controller("one", &["--auto-gateways=false"]).await?;
        // The first Gateway keeps contested nodes and prefixes: the older one or, if created in the same second,
        // the first by name.
        let selector = json!({"nodeSelector": {"matchLabels": {"room": "7"}}});
        fixture.put_node("r-a", 7, &[("room", "7")]).await?;
        fixture.put_gateway("a-first", selector.clone()).await?;
        fixture.put_extra_prefixes("a-first", "192.168.7.0/24").await?;
        fixture.two_pools_are_ready().await?;
        let holds = |g: &raven_api::Gateway| {
            let subnets = status(g).nodes.first().map(|n| n.subnets.clone()).unwrap_or_default();
            anyhow::ensure!(subnets == ["10.244.7.0/24", "fd00:244:7::/64", "192.168.7.0/24"], "{subnets:?}");
            has_condition(g, "Ready", "True", "Ready", "")
        };
        fixture.until("a-first", "holds node and prefixes", holds).await?;
        let others = [fixture.raw("a-first").await?, fixture.raw("cloud").await?, fixture.raw("site").await?];

        fixture.put_gateway("b-second", selector).await?;
        let node_message = "node r-a matches this nodeSelector and belongs to Gateway a-first";
        let refused = fixture.until("b-second", "does not get the node", |g| has_condition(g, "Accepted", "False", "NodeClaimedTwice", node_message)).await?;
        assert_eq!(nodes(&refused).len(), 0);
        has_condition(&refused, "Ready", "False", "NoNode", "raven.openyurt.io/gateway=b-second")?;
        assert_eq!(fixture.event("b-second", "NodeClaimedTwice", node_message).await?, "Warning");
        let note = "node r-a belongs to this Gateway (which is older, or first by name); the nodeSelector of Gateway b-second matches it too";
        assert_eq!(fixture.event("a-first", "NodeContested", note).await?, "Normal");

        // The second Gateway has its own node and two contested prefixes: one from its annotation, one from its node.
        fixture.put_gateway("b-second", json!({"exposeType": ""})).await?;
        fixture.put_node("s-a", 8, &[(LABEL_GATEWAY, "b-second")]).await?;
        fixture.put_extra_prefixes("b-second", "192.168.0.0/16, 192.168.8.0/24").await?;
        let prefix_message = "prefix 192.168.0.0/16 of annotation raven.openyurt.io/extra-allowed-source-cidrs overlaps 192.168.7.0/24 of node r-a in Gateway a-first";
        let refused = fixture.until("b-second", "does not get the prefix", |g| has_condition(g, "Accepted", "False", "PrefixClaimedTwice", prefix_message)).await?;
        assert_eq!(status(&refused).nodes[0].subnets, ["10.244.8.0/24", "fd00:244:8::/64", "192.168.8.0/24"], "only the contested prefix is missing");
        elects(&refused, &["s-a"])?;
        has_condition(&refused, "Ready", "True", "Degraded", "Gateway a-first, which keeps it")?;
        assert_eq!(fixture.event("b-second", "PrefixClaimedTwice", prefix_message).await?, "Warning");
        let note = "192.168.7.0/24 of node r-a stays with this Gateway; Gateway b-second claims it too (prefix 192.168.0.0/16 of annotation";
        assert_eq!(fixture.event("a-first", "PrefixContested", note).await?, "Normal");

        fixture.put_node_at("s-b", 7, 9, &[(LABEL_GATEWAY, "b-second")]).await?;
        let pod_message = "podCIDR 10.244.7.0/24 of node s-b overlaps 10.244.7.0/24 of node r-a in Gateway a-first";
        let refused = fixture.until("b-second", "does not get the pod prefix", |g| has_condition(g, "Accepted", "False", "PrefixClaimedTwice", pod_message)).await?;
        let subnets = |name: &str| status(&refused).nodes.iter().find(|n| n.node_name == name).map(|n| n.subnets.clone());
        assert_eq!((subnets("s-a").map(|s| s.len()), subnets("s-b")), (Some(3), Some(Vec::new())));

        fixture.fence().await?;
        let now = [fixture.raw("a-first").await?, fixture.raw("cloud").await?, fixture.raw("site").await?];
        assert_eq!(now, others, "the other Gateways must not change");
        Ok(())
    })
    .await;
}
