use crate::{BlockLayout, CoreError, FactorType, Shape, Spikes, SpikesRef};
use bitstack_pack::{SignMatrix, SignView};
use half::f16;

/// The stored values of a factor, owned. Which values make a *vector* (and share a scale) is said by [`Basis`] and [`Coefficients`].
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Half precision.
    F16(Vec<f16>),
    /// Signed bytes, with one scale per vector.
    I8 {
        /// The codes, in the order of the values.
        codes: Vec<i8>,
        /// One scale per vector.
        scales: Vec<f16>,
    },
    /// One scale per vector, see [`FactorType::Scales`].
    Scales(Vec<f16>),
}

/// The stored values of a factor, borrowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ValuesRef<'a> {
    /// Half precision.
    F16(&'a [f16]),
    /// Signed bytes, with one scale per vector.
    I8 {
        /// The codes, in the order of the values.
        codes: &'a [i8],
        /// One scale per vector.
        scales: &'a [f16],
    },
    /// One scale per vector, see [`FactorType::Scales`].
    Scales(&'a [f16]),
}

impl Values {
    /// The same values, borrowed.
    pub fn view(&self) -> ValuesRef<'_> {
        match self {
            Self::F16(values) => ValuesRef::F16(values),
            Self::I8 { codes, scales } => ValuesRef::I8 { codes, scales },
            Self::Scales(scales) => ValuesRef::Scales(scales),
        }
    }
}

impl ValuesRef<'_> {
    /// How the values are stored.
    pub fn factor_type(self) -> FactorType {
        match self {
            Self::F16(_) => FactorType::F16,
            Self::I8 { .. } => FactorType::I8,
            Self::Scales(_) => FactorType::Scales,
        }
    }

    /// A copy that owns its values.
    pub fn to_owned(self) -> Values {
        match self {
            Self::F16(values) => Values::F16(values.to_vec()),
            Self::I8 { codes, scales } => Values::I8 { codes: codes.to_vec(), scales: scales.to_vec() },
            Self::Scales(scales) => Values::Scales(scales.to_vec()),
        }
    }

    fn check(self, what: &'static str, n_values: Option<usize>, n_vectors: usize) -> Result<(), CoreError> {
        let (actual, scales) = match self {
            Self::F16(values) => (Some(values.len()), None),
            Self::I8 { codes, scales } => (Some(codes.len()), Some(scales)),
            Self::Scales(scales) => (None, Some(scales)),
        };
        if let Some(scales) = scales
            && scales.len() != n_vectors
        {
            let what = "the number of scales of a factor";
            return Err(CoreError::Mismatch { what, expected: n_vectors, actual: scales.len() });
        }
        let expected = n_values.unwrap_or(usize::MAX);
        if let Some(actual) = actual
            && actual != expected
        {
            return Err(CoreError::Mismatch { what, expected, actual });
        }
        let finite = match self {
            Self::F16(values) => values,
            Self::I8 { scales, .. } | Self::Scales(scales) => scales,
        };
        // All of them first, which is quick (a loop without exits on the exponents), since blocks are looked at each time they are used.
        const EXPONENT: u16 = 0x7c00;
        if finite.iter().fold(true, |all, x| all & (x.to_bits() & EXPONENT != EXPONENT)) {
            return Ok(());
        }
        match finite.iter().position(|x| !x.is_finite()) {
            Some(index) => Err(CoreError::NotFinite { what, index }),
            None => Ok(()),
        }
    }

    fn get(self, index: usize, vector: usize) -> f32 {
        match self {
            Self::F16(values) => values[index].to_f32(),
            Self::I8 { codes, scales } => f32::from(codes[index]) * scales[vector].to_f32(),
            Self::Scales(_) => unreachable!("a basis has values, and scales of coefficients multiply codes"),
        }
    }
}

/// A basis V, `rank x cols`, row-major; each of its `rank` rows is a vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    rank: usize,
    cols: usize,
    values: Values,
}

/// A borrowed [`Basis`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BasisRef<'a> {
    rank: usize,
    cols: usize,
    values: ValuesRef<'a>,
}

/// Coefficients U, `rows x planes x rank`, row-major; for each plane and rank the `rows` values are a vector. Or only a scale for each of
/// these vectors, whose codes are then those of block 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    rows: usize,
    planes: usize,
    rank: usize,
    values: Values,
}

/// Borrowed [`Coefficients`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CoefficientsRef<'a> {
    rows: usize,
    planes: usize,
    rank: usize,
    values: ValuesRef<'a>,
    /// What scales multiply: the codes of block 1, `rows x 1 x rank`.
    first: &'a [i8],
}

impl Basis {
    /// Takes `rank * cols` finite values.
    pub fn new(rank: usize, cols: usize, values: Values) -> Result<Self, CoreError> {
        BasisRef::new(rank, cols, values.view())?;
        Ok(Self { rank, cols, values })
    }

    /// The same basis, borrowed.
    pub fn view(&self) -> BasisRef<'_> {
        BasisRef { rank: self.rank, cols: self.cols, values: self.values.view() }
    }
}

impl<'a> BasisRef<'a> {
    /// Borrows `rank * cols` finite values.
    pub fn new(rank: usize, cols: usize, values: ValuesRef<'a>) -> Result<Self, CoreError> {
        at_least_one("the rank of a basis", rank)?;
        if values.factor_type() == FactorType::Scales {
            return Err(CoreError::ScalesOfBasis);
        }
        values.check("the number of values of a basis", rank.checked_mul(cols), rank)?;
        Ok(Self { rank, cols, values })
    }

    /// Rows of V.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// Columns of V.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// The stored values.
    pub fn values(self) -> ValuesRef<'a> {
        self.values
    }

    /// V[k, col]. Panics when there is no such element.
    pub fn get(self, k: usize, col: usize) -> f32 {
        assert!(k < self.rank && col < self.cols, "element ({k}, {col}) of a {} x {} basis", self.rank, self.cols);
        self.values.get(k * self.cols + col, k)
    }
}

impl Coefficients {
    /// Takes `rows * planes * rank` finite values, or `planes * rank` scales.
    pub fn new(rows: usize, planes: usize, rank: usize, values: Values) -> Result<Self, CoreError> {
        CoefficientsRef::new(rows, planes, rank, values.view())?;
        Ok(Self { rows, planes, rank, values })
    }

    /// The same coefficients, borrowed.
    pub fn view(&self) -> CoefficientsRef<'_> {
        let &Self { rows, planes, rank, ref values } = self;
        CoefficientsRef { rows, planes, rank, values: values.view(), first: &[] }
    }
}

impl<'a> CoefficientsRef<'a> {
    /// Borrows `rows * planes * rank` finite values, or `planes * rank` scales.
    pub fn new(rows: usize, planes: usize, rank: usize, values: ValuesRef<'a>) -> Result<Self, CoreError> {
        at_least_one("the planes of coefficients", planes)?;
        at_least_one("the rank of coefficients", rank)?;
        let vectors = planes.saturating_mul(rank);
        values.check("the number of coefficients", rows.checked_mul(vectors), vectors)?;
        Ok(Self { rows, planes, rank, values, first: &[] })
    }

    /// The same, with what scales multiply: the codes of the coefficients of block 1.
    pub(crate) fn with_first(self, first: CoefficientsRef<'a>) -> Self {
        match (self.values, first.values) {
            (ValuesRef::Scales(_), ValuesRef::I8 { codes, .. }) => Self { first: codes, ..self },
            _ => self,
        }
    }

    /// What scales multiply: the codes of block 1, `rows x 1 x rank`. Empty for values that stand for themselves, and for a block that is
    /// not part of a [`crate::Level`].
    pub fn first_codes(self) -> &'a [i8] {
        self.first
    }

    /// Rows of the weight.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Planes these coefficients are for.
    pub fn planes(self) -> usize {
        self.planes
    }

    /// Coefficients per row and plane.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// The stored values.
    pub fn values(self) -> ValuesRef<'a> {
        self.values
    }

    /// U[row, plane, k], planes counted from 0. Panics when there is no such element, and for scales of a block that is not part of a
    /// [`crate::Level`].
    pub fn get(self, row: usize, plane: usize, k: usize) -> f32 {
        assert!(
            row < self.rows && plane < self.planes && k < self.rank,
            "element ({row}, {plane}, {k}) of {} x {} x {} coefficients",
            self.rows,
            self.planes,
            self.rank
        );
        let vector = plane * self.rank + k;
        match self.values {
            ValuesRef::Scales(scales) => f32::from(self.first[row * self.rank + k]) * scales[vector].to_f32(),
            values => values.get(row * self.planes * self.rank + vector, vector),
        }
    }
}

/// One block of a stack, owned. That its parts fit together, and fit a weight, is checked where it joins one
/// ([`crate::WeightStack::push`], [`crate::Level::new`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// The sign plane, `rows x cols`.
    pub signs: SignMatrix,
    /// The basis, `rank x cols`; `None`: that of the last block before which has one.
    pub basis: Option<Basis>,
    /// The coefficients, `rows x planes x rank`.
    pub coefficients: Coefficients,
    /// The spikes of the weight, in block 1 only.
    pub spikes: Option<Spikes>,
}

/// One block of a stack, borrowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockRef<'a> {
    /// The sign plane, `rows x cols`.
    pub signs: SignView<'a>,
    /// The basis, `rank x cols`; `None`: that of the last block before which has one.
    pub basis: Option<BasisRef<'a>>,
    /// The coefficients, `rows x planes x rank`.
    pub coefficients: CoefficientsRef<'a>,
    /// The spikes of the weight, in block 1 only.
    pub spikes: Option<SpikesRef<'a>>,
}

impl Block {
    /// The same block, borrowed.
    pub fn view(&self) -> BlockRef<'_> {
        BlockRef {
            signs: self.signs.view(),
            basis: self.basis.as_ref().map(Basis::view),
            coefficients: self.coefficients.view(),
            spikes: self.spikes.as_ref().map(Spikes::view),
        }
    }
}

impl BlockRef<'_> {
    /// What the block is made of.
    pub fn layout(&self) -> Result<BlockLayout, CoreError> {
        Ok(BlockLayout {
            shape: Shape::new(self.signs.rows(), self.signs.cols())?,
            rank: self.coefficients.rank,
            planes: self.coefficients.planes,
            basis: self.basis.map(|v| v.values.factor_type()),
            coefficients: self.coefficients.values.factor_type(),
            spike_words: self.spikes.map_or(0, |s| s.words().len()),
        })
    }

    /// Checks that the parts agree with each other and with a weight of this shape, as its block number `number` (from 1), `rank`
    /// being that of the blocks before.
    pub(crate) fn check(
        &self,
        shape: Shape,
        number: usize,
        first: Option<CoefficientsRef<'_>>,
    ) -> Result<(), CoreError> {
        let equal = |what, expected, actual| {
            if expected == actual { Ok(()) } else { Err(CoreError::Mismatch { what, expected, actual }) }
        };
        equal("rows of the signs", shape.rows(), self.signs.rows())?;
        equal("columns of the signs", shape.cols(), self.signs.cols())?;
        equal("rows of the coefficients", shape.rows(), self.coefficients.rows)?;
        if let Some(first) = first {
            equal("the rank of all blocks of a weight", first.rank, self.coefficients.rank)?;
        }
        if let Some(basis) = self.basis {
            equal("columns of the basis", shape.cols(), basis.cols)?;
            equal("the rank of the basis", self.coefficients.rank, basis.rank)?;
        } else if number == 1 {
            return Err(CoreError::NoBasis);
        }
        let codes = first.is_some_and(|first| first.values.factor_type() == FactorType::I8);
        if self.coefficients.values.factor_type() == FactorType::Scales && !codes {
            return Err(CoreError::NoCodes { block: number });
        }
        if let Some(spikes) = self.spikes {
            equal("rows of the spikes", shape.rows(), spikes.shape().rows())?;
            equal("columns of the spikes", shape.cols(), spikes.shape().cols())?;
            if number != 1 {
                return Err(CoreError::SpikesLate { block: number });
            }
        }
        let planes = self.coefficients.planes;
        if planes != 1 && planes != number {
            return Err(CoreError::Planes { block: number, planes });
        }
        Ok(())
    }
}

fn at_least_one(what: &'static str, n: usize) -> Result<(), CoreError> {
    if n == 0 { Err(CoreError::Mismatch { what, expected: 1, actual: 0 }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(values: &[f32]) -> Values {
        Values::F16(values.iter().map(|&x| f16::from_f32(x)).collect())
    }

    #[test]
    fn eight_bit_values_take_the_scale_of_their_vector() {
        let scales = vec![f16::from_f32(0.5), f16::from_f32(2.0)];
        let codes = vec![1, 2, 3, -4, -5, -6];
        let v = Basis::new(2, 3, Values::I8 { codes: codes.clone(), scales: scales.clone() }).unwrap();
        assert_eq!([v.view().get(0, 2), v.view().get(1, 0)], [1.5, -8.0]); // a vector is a row of V
        let u = Coefficients::new(3, 2, 1, Values::I8 { codes, scales }).unwrap();
        assert_eq!([u.view().get(0, 1, 0), u.view().get(2, 0, 0)], [4.0, -2.5]); // a vector is a column of U
    }

    #[test]
    fn scales_need_something_to_multiply() {
        let scales = || Values::Scales(vec![f16::ONE; 2]);
        assert_eq!(Basis::new(2, 3, scales()), Err(CoreError::ScalesOfBasis));
        assert!(matches!(
            Coefficients::new(9, 3, 1, scales()),
            Err(CoreError::Mismatch { expected: 3, actual: 2, .. })
        ));
        let infinite = Values::Scales(vec![f16::ONE, f16::INFINITY]);
        assert!(matches!(Coefficients::new(9, 2, 1, infinite), Err(CoreError::NotFinite { index: 1, .. })));
        let mut stack = crate::WeightStack::new(Shape::new(1, 1).unwrap());
        let block = |planes, values| Block {
            signs: SignMatrix::from_bytes(1, 1, vec![1]).unwrap(),
            basis: (planes == 1).then(|| Basis::new(1, 1, halves(&[2.0])).unwrap()),
            coefficients: Coefficients::new(1, planes, 1, values).unwrap(),
            spikes: None,
        };
        let alone = block(1, Values::Scales(vec![f16::ONE]));
        assert_eq!(stack.push(alone), Err(CoreError::NoCodes { block: 1 }));
        let second = block(2, Values::Scales(vec![f16::from_f32(0.5), f16::from_f32(0.25)]));
        let mut halves_first = stack.clone();
        halves_first.push(block(1, halves(&[3.0]))).unwrap();
        assert_eq!(halves_first.push(second.clone()), Err(CoreError::NoCodes { block: 2 }));
        stack.push(block(1, Values::I8 { codes: vec![3], scales: vec![f16::from_f32(4.0)] })).unwrap();
        stack.push(second).unwrap();
        assert_eq!(stack.bytes(2) - stack.bytes(1), 1 + 4);
        assert_eq!(stack.level(2).unwrap().reconstruct(), [2.0 * 3.0 * (0.5 + 0.25)]);
    }

    #[test]
    fn wrong_lengths_and_values_are_rejected() {
        assert!(matches!(Basis::new(1, 3, halves(&[1.0; 2])), Err(CoreError::Mismatch { expected: 3, actual: 2, .. })));
        assert!(matches!(Basis::new(0, 3, halves(&[])), Err(CoreError::Mismatch { expected: 1, actual: 0, .. })));
        assert!(matches!(Basis::new(1, 2, halves(&[1.0, f32::INFINITY])), Err(CoreError::NotFinite { index: 1, .. })));
        assert!(Coefficients::new(usize::MAX, 2, 2, halves(&[])).is_err());
        let one_scale_short = Values::I8 { codes: vec![0; 4], scales: vec![f16::ONE] };
        assert!(matches!(
            Coefficients::new(2, 2, 1, one_scale_short),
            Err(CoreError::Mismatch { expected: 2, actual: 1, .. })
        ));
    }
}
