"""The gated norm under the names that other projects give it: change the import, keep the call.

`gatednorm.compat.fla`, `.mamba`, `.sglang` and `.vllm` have each project's own names, signatures,
defaults, results and attributes. `rms_norm_gated` and `RMSNormGated` mean another thing in each of
them, which is why these are four modules. docs/adopt.md says which import takes the place of which.
"""
