//! Rotary positions, as a config describes them.

/// Frequencies of the rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Scaling of the long wavelengths, as in Llama 3.1 (`rope_type` `llama3`).
    pub scaling: Option<Llama3Scaling>,
}

/// Parameters of the Llama 3.1 scaling of rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Long wavelengths are stretched by this factor.
    pub factor: f64,
    /// Wavelengths above `original_positions / low_freq_factor` are stretched in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_positions / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length of the training before the extension.
    pub original_positions: f64,
}
