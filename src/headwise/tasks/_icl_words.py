"""The word lists behind `tasks.icl`: pairs a line where a rule cannot make them, single words where it can."""

NOUNS = """apple bird boat book bottle bridge brother button cake camera candle carpet castle chair circle cloud coat coin corner
cousin daughter desk doctor dog dream driver eagle engine farmer father field finger flower forest friend garden gate ghost girl
guitar hammer hand hat heart hill horse hotel house island jacket joke king kitchen lake lamp leader letter lion market mirror
moment monkey mother motor mountain museum needle neighbor nurse ocean office orange painter paper pencil phone picture pillow
pilot planet plant pocket poet prison queen question rabbit river road robot rock room sailor school season secret shirt shoe
shop singer sister soldier song spider spoon star station stone storm street student summer table teacher temple ticket tiger
tower town train tree truck tunnel uncle valley village wheel window winter winner worker writer"""

PLURALS = """baby:babies box:boxes bus:buses child:children church:churches city:cities class:classes country:countries
dish:dishes family:families foot:feet fox:foxes glass:glasses knife:knives lady:ladies leaf:leaves life:lives man:men
mouse:mice party:parties story:stories tooth:teeth watch:watches wife:wives wolf:wolves woman:women"""

PAST = """begin:began break:broke bring:brought build:built buy:bought catch:caught choose:chose come:came draw:drew
drink:drank drive:drove eat:ate fall:fell feel:felt find:found fly:flew forget:forgot get:got give:gave go:went grow:grew
hear:heard hold:held keep:kept know:knew leave:left lose:lost make:made meet:met pay:paid ride:rode ring:rang rise:rose
run:ran say:said see:saw sell:sold send:sent sing:sang sit:sat sleep:slept speak:spoke spend:spent stand:stood steal:stole
swim:swam take:took teach:taught tell:told think:thought throw:threw understand:understood wake:woke wear:wore win:won
write:wrote"""

VERBS = """answer ask boil call clean climb cook count cover cross enter explain fill follow happen help hunt jump kick knock
laugh learn listen look melt mix need offer open order paint pass pick plant play point pull push rain reach remember rest
return roll shout show smell sort start stay talk thank touch train turn visit wait walk wander want warn wash watch work"""

VERBS_E = """agree arrive bake believe care change chase close continue dance decide divide escape guide hate hope imagine
improve invite joke like live love measure move name notice place prepare promise prove receive remove save serve share
smile taste tie trade use vote"""

COMPARATIVES = """big:bigger bright:brighter cheap:cheaper clean:cleaner clear:clearer cold:colder cool:cooler dark:darker
deep:deeper dry:drier early:earlier easy:easier fast:faster fat:fatter few:fewer fine:finer funny:funnier happy:happier
hard:harder heavy:heavier high:higher hot:hotter kind:kinder large:larger late:later light:lighter long:longer loud:louder
low:lower lucky:luckier narrow:narrower near:nearer new:newer nice:nicer old:older poor:poorer quick:quicker quiet:quieter
rich:richer rough:rougher sad:sadder safe:safer sharp:sharper short:shorter simple:simpler slow:slower small:smaller
smart:smarter smooth:smoother soft:softer strange:stranger strong:stronger sweet:sweeter tall:taller thick:thicker thin:thinner
tight:tighter tiny:tinier warm:warmer weak:weaker wet:wetter wide:wider wild:wilder wise:wiser young:younger"""

ANTONYMS = """above:below accept:reject alive:dead always:never ancient:modern asleep:awake before:after begin:end best:worst
big:small black:white brave:cowardly bright:dark buy:sell cheap:expensive clean:dirty cold:hot cruel:kind dangerous:safe
day:night deep:shallow difficult:easy down:up dry:wet early:late east:west empty:full enemy:friend entrance:exit even:odd
fail:succeed false:true far:near fast:slow female:male first:last forget:remember front:back give:take good:bad guilty:innocent
happy:sad hard:soft healthy:sick heavy:light high:low ill:well include:exclude increase:decrease inside:outside join:leave
laugh:cry left:right less:more long:short loose:tight lose:win loud:quiet love:hate maximum:minimum narrow:wide new:old
noisy:quiet north:south off:on open:closed over:under past:future peace:war poor:rich positive:negative public:private
pull:push question:answer rough:smooth same:different simple:complex sour:sweet start:finish strong:weak summer:winter
tall:short thick:thin top:bottom ugly:beautiful victory:defeat visible:invisible wild:tame yes:no young:old"""

CAPITALS = """Afghanistan:Kabul Albania:Tirana Algeria:Algiers Argentina:Buenos_Aires Armenia:Yerevan Australia:Canberra
Austria:Vienna Bangladesh:Dhaka Belgium:Brussels Bolivia:La_Paz Bulgaria:Sofia Cambodia:Phnom_Penh Canada:Ottawa
Chile:Santiago China:Beijing Colombia:Bogota Croatia:Zagreb Cuba:Havana Cyprus:Nicosia Denmark:Copenhagen Ecuador:Quito
Egypt:Cairo Estonia:Tallinn Ethiopia:Addis_Ababa Finland:Helsinki France:Paris Georgia:Tbilisi Germany:Berlin Ghana:Accra
Greece:Athens Hungary:Budapest Iceland:Reykjavik India:New_Delhi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Ireland:Dublin
Israel:Jerusalem Italy:Rome Jamaica:Kingston Japan:Tokyo Jordan:Amman Kenya:Nairobi Latvia:Riga Lebanon:Beirut Libya:Tripoli
Lithuania:Vilnius Malaysia:Kuala_Lumpur Malta:Valletta Mexico:Mexico_City Mongolia:Ulaanbaatar Morocco:Rabat Nepal:Kathmandu
Netherlands:Amsterdam Nigeria:Abuja Norway:Oslo Pakistan:Islamabad Peru:Lima Philippines:Manila Poland:Warsaw Portugal:Lisbon
Romania:Bucharest Russia:Moscow Senegal:Dakar Serbia:Belgrade Slovakia:Bratislava Slovenia:Ljubljana Somalia:Mogadishu
Spain:Madrid Sudan:Khartoum Sweden:Stockholm Switzerland:Bern Syria:Damascus Taiwan:Taipei Thailand:Bangkok Tunisia:Tunis
Turkey:Ankara Uganda:Kampala Ukraine:Kyiv Uruguay:Montevideo Venezuela:Caracas Vietnam:Hanoi Zambia:Lusaka Zimbabwe:Harare"""

DEMONYMS = """Albania:Albanian Algeria:Algerian Argentina:Argentine Australia:Australian Austria:Austrian Belgium:Belgian
Brazil:Brazilian Bulgaria:Bulgarian Canada:Canadian Chile:Chilean China:Chinese Colombia:Colombian Croatia:Croatian Cuba:Cuban
Denmark:Danish Egypt:Egyptian England:English Estonia:Estonian Ethiopia:Ethiopian Finland:Finnish France:French Germany:German
Ghana:Ghanaian Greece:Greek Hungary:Hungarian Iceland:Icelandic India:Indian Indonesia:Indonesian Iran:Iranian Iraq:Iraqi
Ireland:Irish Israel:Israeli Italy:Italian Jamaica:Jamaican Japan:Japanese Kenya:Kenyan Korea:Korean Lebanon:Lebanese
Libya:Libyan Malaysia:Malaysian Mexico:Mexican Mongolia:Mongolian Morocco:Moroccan Nepal:Nepalese Netherlands:Dutch
Nigeria:Nigerian Norway:Norwegian Pakistan:Pakistani Peru:Peruvian Poland:Polish Portugal:Portuguese Romania:Romanian
Russia:Russian Scotland:Scottish Serbia:Serbian Spain:Spanish Sudan:Sudanese Sweden:Swedish Switzerland:Swiss Syria:Syrian
Thailand:Thai Turkey:Turkish Uganda:Ugandan Ukraine:Ukrainian Venezuela:Venezuelan Vietnam:Vietnamese Wales:Welsh"""

KINDS = {
    "animal": """bear bee camel cat cow crocodile deer dog dolphin donkey duck eagle elephant fox frog giraffe goat horse
kangaroo lion monkey mouse owl panda penguin pig rabbit rat shark sheep snake spider tiger whale wolf zebra""",
    "fruit": """apple apricot banana blackberry blueberry cherry coconut fig grape grapefruit kiwi lemon lime mango melon
nectarine orange papaya peach pear pineapple plum pomegranate raspberry strawberry watermelon""",
    "color": """beige black blue brown crimson gold gray green indigo magenta maroon navy pink purple red scarlet silver
turquoise violet white yellow""",
    "vehicle": """airplane ambulance bicycle boat bus canoe car ferry helicopter jeep limousine motorcycle scooter ship
submarine taxi tractor train tram truck van yacht""",
}

GOOD = """admirable amazing awesome beautiful best brilliant charming cheerful clever comfortable delicious delightful elegant
enjoyable excellent exciting fabulous fantastic friendly fun generous gentle glorious good gorgeous grateful great happy
helpful honest incredible inspiring joyful kind lovely lucky magnificent marvelous nice outstanding perfect pleasant proud
remarkable splendid stunning superb sweet terrific wonderful"""

BAD = """angry annoying awful bad bitter boring broken cruel depressing dirty disappointing disgusting dreadful dull evil
failed foolish frightening gloomy greedy guilty harmful hateful horrible hostile hurtful lazy lonely lousy mean miserable
nasty painful pathetic poor rotten rude sad scary selfish shameful sick stupid terrible tragic ugly unfair unhappy useless
worst"""

NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen"""

TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
