//! What a Gateway claims in vain: it is told, and nobody else notices.

use raven_api::LABEL_GATEWAY;
use serde_json::json;

use crate::stage::{elects, nodes, play, says, site, status};

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_names_an_unknown_node_is_refused_and_the_rest_works() {
    play("an_endpoint_that_names_an_unknown_node_is_refused_and_the_rest_works", async |stage| {
        stage.put_two_pools().await?;
        let _controller = stage.controller("one", &[]).await?;
        stage.two_pools_are_ready().await?;
        let (cloud, before) = (stage.raw("cloud").await?, status(&stage.gateways.get("site").await?));

        stage.put_gateway("site", site(&["nowhere", "x-b", "x-a"])).await?;
        let refused = stage
            .until("site", "refuses the unknown node", |g| {
                says(g, "Accepted", "False", "EndpointNodeUnknown", "node nowhere, which does not exist")
            })
            .await?;
        let after = status(&refused);
        assert_eq!((after.nodes, after.node_count, after.active_endpoints), (before.nodes, before.node_count, before.active_endpoints));
        says(&refused, "Elected", "True", "Elected", "tunnel: x-b")?;
        says(&refused, "Ready", "True", "Degraded", "node nowhere, which does not exist")?;
        assert_eq!(stage.event("site", "EndpointNodeUnknown", "node nowhere, which does not exist").await?, "Warning");

        // A node of another pool is as unknown to this one.
        stage.put_gateway("site", site(&["c-a", "x-b"])).await?;
        let foreign = stage
            .until("site", "refuses the foreign node", |g| {
                says(g, "Accepted", "False", "EndpointNodeUnknown", "node c-a, which is not a node of this pool")
            })
            .await?;
        elects(&foreign, &["x-b"])?;
        assert_eq!(nodes(&foreign), ["x-a", "x-b"]);

        stage.put_gateway("site", site(&["x-b", "x-a"])).await?;
        stage.until("site", "is accepted", |g| says(g, "Accepted", "True", "Accepted", "")).await?;
        assert_eq!(stage.event("site", "Accepted", "in force").await?, "Normal");
        assert_eq!(stage.raw("cloud").await?, cloud, "the other Gateway is as it was, byte for byte");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_claim_a_node_or_a_prefix_one_is_told_and_the_other_is_untouched() {
    play("of_two_that_claim_a_node_or_a_prefix_one_is_told_and_the_other_is_untouched", async |stage| {
        stage.put_two_pools().await?;
        let _controller = stage.controller("one", &["--auto-gateways=false"]).await?;
        // Older and, should both be created within a second, first by name: the first keeps what both claim.
        let selector = json!({"nodeSelector": {"matchLabels": {"room": "7"}}});
        stage.put_node("r-a", 7, &[("room", "7")]).await?;
        stage.put_gateway("a-first", selector.clone()).await?;
        stage.put_extra_prefixes("a-first", "192.168.7.0/24").await?;
        stage.two_pools_are_ready().await?;
        let holds = |g: &raven_api::Gateway| {
            let subnets = status(g).nodes.first().map(|n| n.subnets.clone()).unwrap_or_default();
            anyhow::ensure!(subnets == ["10.244.7.0/24", "fd00:244:7::/64", "192.168.7.0/24"], "{subnets:?}");
            says(g, "Ready", "True", "Ready", "")
        };
        stage.until("a-first", "holds node and prefixes", holds).await?;
        let others = [stage.raw("a-first").await?, stage.raw("cloud").await?, stage.raw("site").await?];

        stage.put_gateway("b-second", selector).await?;
        let says_node = "node r-a matches this nodeSelector and belongs to Gateway a-first";
        let refused = stage.until("b-second", "does not get the node", |g| says(g, "Accepted", "False", "NodeClaimedTwice", says_node)).await?;
        assert_eq!(nodes(&refused).len(), 0);
        says(&refused, "Ready", "False", "NoNode", "raven.openyurt.io/gateway=b-second")?;
        assert_eq!(stage.event("b-second", "NodeClaimedTwice", says_node).await?, "Warning");
        let told = "node r-a belongs to this Gateway (which is older, or first by name); the nodeSelector of Gateway b-second matches it too";
        assert_eq!(stage.event("a-first", "NodeContested", told).await?, "Normal");

        // With a node of its own and prefixes of others: one that its annotation wants, one that its node brings along.
        stage.put_gateway("b-second", json!({"exposeType": ""})).await?;
        stage.put_node("s-a", 8, &[(LABEL_GATEWAY, "b-second")]).await?;
        stage.put_extra_prefixes("b-second", "192.168.0.0/16, 192.168.8.0/24").await?;
        let says_prefix = "prefix 192.168.0.0/16 of annotation raven.openyurt.io/extra-allowed-source-cidrs overlaps 192.168.7.0/24 of node r-a in Gateway a-first";
        let refused = stage.until("b-second", "does not get the prefix", |g| says(g, "Accepted", "False", "PrefixClaimedTwice", says_prefix)).await?;
        assert_eq!(status(&refused).nodes[0].subnets, ["10.244.8.0/24", "fd00:244:8::/64", "192.168.8.0/24"], "all but the refused one");
        elects(&refused, &["s-a"])?;
        says(&refused, "Ready", "True", "Degraded", "Gateway a-first, which keeps it")?;
        assert_eq!(stage.event("b-second", "PrefixClaimedTwice", says_prefix).await?, "Warning");
        let told = "192.168.7.0/24 of node r-a stays with this Gateway; Gateway b-second claims it too (prefix 192.168.0.0/16 of annotation";
        assert_eq!(stage.event("a-first", "PrefixContested", told).await?, "Normal");

        stage.put_node_at("s-b", 7, 9, &[(LABEL_GATEWAY, "b-second")]).await?;
        let says_pod = "podCIDR 10.244.7.0/24 of node s-b overlaps 10.244.7.0/24 of node r-a in Gateway a-first";
        let refused = stage.until("b-second", "does not get the pod prefix", |g| says(g, "Accepted", "False", "PrefixClaimedTwice", says_pod)).await?;
        let subnets = |name: &str| status(&refused).nodes.iter().find(|n| n.node_name == name).map(|n| n.subnets.clone());
        assert_eq!((subnets("s-a").map(|s| s.len()), subnets("s-b")), (Some(3), Some(Vec::new())));

        stage.fence().await?;
        let now = [stage.raw("a-first").await?, stage.raw("cloud").await?, stage.raw("site").await?];
        assert_eq!(now, others, "all others are as they were, byte for byte");
        Ok(())
    })
    .await;
}
